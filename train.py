"""Trains: the same as `deepclust train`, for a clone of the repository.

One run:               python train.py data=digits seed=1
Several, in turn:      python train.py -m seed=0,1,2 optim.lr=1e-3,2e-3
On several GPUs:       torchrun --nproc-per-node 4 train.py experiment=scan_cifar10
Go on where it stopped: the same command again; run.new=true starts over

`python train.py --help` says what can be chosen, `--cfg` prints every key with its value.
"""

import sys

from deepclust.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
