//! PEFT folders in and out, and classifiers made of them.
