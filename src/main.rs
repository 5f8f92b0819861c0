//! The caifs program: argv to the command line, errors to stderr.

fn main() {}
