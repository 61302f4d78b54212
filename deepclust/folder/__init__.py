"""`deepclust cluster`: a folder of images in; clusters, a table, a map and a report out."""
