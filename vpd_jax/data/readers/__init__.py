"""What several data sets read: image files, label maps, sentences, persons, COCO JSON."""
