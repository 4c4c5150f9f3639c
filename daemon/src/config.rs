//! The configuration: what each setting means and its default stand beside it.
