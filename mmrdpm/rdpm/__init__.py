"""The image tokeniser of RDPM: pixels <-> latents <-> recurrent code indices."""
