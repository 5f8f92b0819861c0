//! The only room that names `fuser`: translates kernel requests to a [`Volume`](crate::volume::Volume) and back.
