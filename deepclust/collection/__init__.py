"""Clusters of a folder of images, kept: found, edited, added to, shown."""
