"""From images to a store of features on disk."""
