"""Quality: clusterings scored against labels, which are read for these figures alone.

- `seeds`: one configuration with several seeds
- `heads`: every head from scratch, on the same data and number of images
- `clusterers`: clusterers of the same frozen features, and label-free choices among them
- `imbalanced`: long-tailed sets, methods that differ in their targets alone
- `num_clusters`: the estimated number of clusters against the true one
- `calibration`: how far confidences can be trusted
- `score_folder`: a run of `deepclust cluster` on a folder with one sub-folder per class
- `duplicates`: near-duplicates found among altered copies of photos
- `features`: writes the files of features that some of these read with `--features`

`common` holds what several of them share.
"""
