//! System calls that no safe crate wraps, behind safe functions: the only room with unsafe code.
