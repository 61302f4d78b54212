"""Speed: medians of CPU time, beside the hardware's floor and other libraries.

- `ops`: k-means, transport and neighbour search (`kmeans`, `transport`, `neighbors` hold the parts)
- `views`: augmentation, beside torchvision
- `train`: training steps and quality per second, beside lightly (`contestants`, `peers`)
- `calibration`: share of the calibration head's k-means in a training step
- `folder`: `deepclust cluster` on a large folder, beside bare decoding and the bare network

`harness` measures and prints. Extra `bench` of the package installs the libraries compared with.
"""
