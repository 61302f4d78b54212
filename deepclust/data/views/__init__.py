"""Random views of images and features: one file for each kind of operation."""
