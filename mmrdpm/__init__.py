"""mmrdpm: one decoder-only transformer over a shared vocabulary of text and RDPM image tokens."""
