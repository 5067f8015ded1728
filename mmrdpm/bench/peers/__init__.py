"""Other ways to draw pictures with a transformer, on equal terms with ours.

Every peer sees the same pictures and captions, has about as many parameters, spends the same
training FLOPs, is trained by the same optimiser with a learning rate found by the same search, and
is judged alike; the blocks and samplers come from the libraries that people use for each.
"""
