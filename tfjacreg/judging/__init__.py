"""What the attacks and the robustness measures rest on: checked classifiers and two searches."""
