//! Archives (.catar): a directory tree as one stream of elements that can also be read at any place (formats.md 4).
//!
//! * [`element`] — header, type and size of an element; [`flags`] — what an archive stores.
//! * [`node`] — one file's metadata; [`shown`] — the same as extended attributes.
//! * [`goodbye`] — the table at the end of each directory.

pub mod element;
pub mod flags;
pub mod goodbye;
pub mod node;
pub mod shown;

pub use element::{CatarError, ENTRY_BYTES, ElementHeader, ElementKind, HEADER_BYTES};
pub use flags::{FeatureFlags, from_fat_attributes, from_fs_flags, to_fs_flags};
pub use goodbye::{GoodbyeTable, ITEM_BYTES, Item, TAIL_BYTES, Tail, encode_goodbye, name_hash, search_tree_order};
pub use node::{
    Acl, AclDefault, AclEntry, Content, Entry, FilenameParse, Node, NodeParse, check_is_archive, parse_filename,
    parse_node,
};
