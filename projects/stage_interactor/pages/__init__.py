"""What one looks at: pages about a run, about the stages, about a data set; boxes on pictures."""
