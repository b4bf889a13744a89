"""From reports to checked supervision: the structured report, what makes it, and how it is read in training."""
