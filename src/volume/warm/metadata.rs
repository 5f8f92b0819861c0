//! All metadata of an archive: every directory is listed, so that the chunks with names, attributes and tables are kept.
//!
//! The one place that `warm --metadata` and `-o warm=metadata` come to: whatever else is to be made of the metadata on this way is made
//! here.

use std::sync::Arc;

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::Tally;
use crate::tree::{Node, Tree, TreeError};

/// Directories read at the same time.
const N_DIRECTORIES: usize = 4;

/// A directory to be listed, from some place on.
struct Rest {
    directory: Arc<Node>,
    from_idx: u64,
}

/// Reads all metadata. Directories that cannot be read are in the tally, and the others are read all the same.
pub(super) async fn read_all(tree: &Tree, tally: &Tally) {
    let root = Arc::clone(tree.root());
    let mut waiting = Vec::new();
    if root.is_directory() {
        waiting.push(Rest { directory: root, from_idx: 0 });
    }
    let mut under_way = FuturesUnordered::new();
    loop {
        // The last found first, so that few wait: those on the way down.
        while under_way.len() < N_DIRECTORIES
            && let Some(rest) = waiting.pop()
        {
            under_way.push(list(tree, rest));
        }
        match under_way.next().await {
            Some(Ok((rest, directories))) => {
                waiting.extend(rest);
                waiting.extend(directories.into_iter().map(|directory| Rest { directory, from_idx: 0 }));
            }
            Some(Err(error)) => tally.failed(1, error),
            None => return,
        }
    }
}

/// Lists a part of a directory: what is left of it, and the directories in that part.
async fn list(tree: &Tree, rest: Rest) -> Result<(Option<Rest>, Vec<Arc<Node>>), TreeError> {
    let children = tree.list(&rest.directory, rest.from_idx).await?;
    let nodes = children.as_slice().iter().map(|child| &child.node);
    let directories = nodes.filter(|node| node.is_directory()).map(Arc::clone).collect();
    let rest = children.next_idx.map(|from_idx| Rest { directory: rest.directory, from_idx });
    Ok((rest, directories))
}
