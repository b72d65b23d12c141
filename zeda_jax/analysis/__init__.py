"""What a run means: FLOPs, routing and reports."""
