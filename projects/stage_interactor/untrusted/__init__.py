"""What comes from others: which files are opened, how much of them is read, where names may lead.

A data set, a picture or a run folder may come from anywhere. What it holds is data: nothing of it
is run, waited for without an end, fills the memory, or names a file that lies elsewhere.
"""
