import sys

from deepclust.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
