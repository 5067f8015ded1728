"""Other ways to draw pictures with a transformer, on equal terms with ours.

Every peer sees the same pictures and captions, has about as many parameters, spends the same
training FLOPs, is trained by the same optimiser at a learning rate that the recipe names, or that a
short search chooses among several, and is judged alike; the blocks and samplers come from the
libraries that people use for each.
"""
