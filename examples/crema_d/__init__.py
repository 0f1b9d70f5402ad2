"""CREMA-D, emotions heard and seen: a whole training program around a dgl_ext head."""
