"""Readers shared by data sets: image files, label maps, sentences, people, COCO JSON."""
