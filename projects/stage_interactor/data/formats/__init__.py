"""How people keep data sets: each format is read as COCO's records, a file each."""
