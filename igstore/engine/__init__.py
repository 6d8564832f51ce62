"""What makes attribution fast and steady: networks rewritten without changing their outputs, memory, and batches."""
