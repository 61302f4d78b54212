"""Layers, queues and base classes that several heads share."""
