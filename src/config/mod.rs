//! What the user typed becomes what the program uses, checked once.
