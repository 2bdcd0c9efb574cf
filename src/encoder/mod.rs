//! The transformer families, their heads, and LoRA on any of their linears.
