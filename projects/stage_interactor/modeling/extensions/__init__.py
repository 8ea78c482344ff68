"""What can be added to the paper's model. Nothing of the paper is in here."""
