"""What a run says of itself: console, JSONL, TensorBoard, the HTML report."""
