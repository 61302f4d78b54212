"""From words to a checked configuration, without importing torch: compose, check against
signatures, build.
"""
