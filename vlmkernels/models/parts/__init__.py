"""What the systems are made of: towers, blocks, decoding, and the files of models."""
