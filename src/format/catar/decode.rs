//! A whole archive as a stream: bytes in, in any split; nodes, payload and ends of nodes out.
//!
//! Payload is never buffered: its events are slices of the caller's own input. What is buffered is one element (bounded
//! by its kind) and, per open directory, 24 bytes for each child, which have cost more than that in the input.

use super::goodbye::{Child, Item, Tail, encode_goodbye, name_hash};
use super::node::{Content, Node, NodeBuilder, filename_body};
use super::{CatarError, ElementHeader, FeatureFlags, GoodbyeTable, Kind, MAX_DEPTH};

/// How strict a [`Decoder`] is.
#[derive(Debug, Clone)]
pub struct DecoderOptions {
    /// Compare every directory's table with the children seen.
    pub verify_goodbye: bool,
    /// Directories nested deeper than this are an error.
    pub max_depth: usize,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self { verify_goodbye: true, max_depth: MAX_DEPTH }
    }
}

/// What comes next in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A node starts. Offsets in its content are not filled in: they have no meaning in a stream.
    Node {
        /// Its name in the directory that is open; `None` for the root.
        name: Option<Vec<u8>>,
        /// Absolute offset of its FILENAME; the root has none.
        filename_offset: Option<u64>,
        /// Absolute offset of its ENTRY.
        entry_offset: u64,
        /// All of its metadata.
        node: Box<Node>,
    },
    /// The next bytes of the regular file that is open (never empty).
    Payload(&'a [u8]),
    /// The node started last and not yet ended is complete: every [`Event::Node`] has one.
    NodeEnd {
        /// Absolute offset behind the node.
        end: u64,
    },
    /// A name without a node, as desync writes for FIFOs and sockets. Nothing else follows for it.
    Orphan {
        /// The name.
        name: Vec<u8>,
    },
}

/// Reads an archive.
///
/// ```
/// # use caifs::format::catar::{CatarError, Decoder, DecoderOptions};
/// # fn each(pieces: &[&[u8]]) -> Result<(), CatarError> {
/// let mut decoder = Decoder::new(DecoderOptions::default());
/// for piece in pieces {
///     let mut input = *piece;
///     while let Some(event) = decoder.next(&mut input)? {
///         println!("{event:?}");
///     }
/// }
/// decoder.finish()
/// # }
/// ```
#[derive(Debug)]
pub struct Decoder {
    options: DecoderOptions,
    /// The element being read, from its header on.
    buffer: Vec<u8>,
    /// Absolute offset of the next byte of input.
    offset: u64,
    state: State,
    flags: Option<FeatureFlags>,
    /// The name read last, until its node starts.
    name: Option<Name>,
    /// The node whose metadata is being read.
    building: Option<Building>,
    /// Where the open node that is not a directory started.
    open_leaf: Option<Option<Name>>,
    directories: Vec<Directory>,
}

#[derive(Debug)]
enum State {
    /// Collecting a header.
    Header,
    /// Has the header (and nothing more) in the buffer.
    HeaderRead(ElementHeader),
    /// Collecting the rest of the element.
    Body(ElementHeader),
    Payload(u64),
    /// The innermost node is complete; what follows starts with this header if it was read already.
    NodeEnd(Option<ElementHeader>),
    Complete,
    Failed(CatarError),
}

#[derive(Debug)]
struct Name {
    name: Vec<u8>,
    filename_offset: u64,
}

#[derive(Debug)]
struct Building {
    builder: NodeBuilder,
    entry_offset: u64,
}

#[derive(Debug)]
struct Directory {
    name: Option<Name>,
    entry_offset: u64,
    children: Vec<Child>,
}

/// Whether the decoder got somewhere.
enum Step<'a> {
    Event(Event<'a>),
    On,
    Starved,
}

impl Decoder {
    /// At the start of an archive.
    pub fn new(options: DecoderOptions) -> Self {
        Self {
            options,
            buffer: Vec::new(),
            offset: 0,
            state: State::Header,
            flags: None,
            name: None,
            building: None,
            open_leaf: None,
            directories: Vec::new(),
        }
    }

    /// The next event, taking bytes off the front of `input`. `None`: all input is used up, and more is needed (or the
    /// archive is complete). After an error the same error comes back for ever.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, CatarError> {
        loop {
            match self.step(input) {
                Ok(Step::On) => {}
                Ok(Step::Event(event)) => return Ok(Some(event)),
                Ok(Step::Starved) => return Ok(None),
                Err(error) => {
                    self.state = State::Failed(error.clone());
                    return Err(error);
                }
            }
        }
    }

    /// Ends the input: an error unless the archive is complete.
    pub fn finish(&self) -> Result<(), CatarError> {
        match &self.state {
            State::Complete => Ok(()),
            State::Failed(error) => Err(error.clone()),
            _ => Err(CatarError::Truncated("a node")),
        }
    }

    /// Whether the root node has ended.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::Complete)
    }

    /// Absolute offset of the next byte of input.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What the archive records, as soon as its first ENTRY is read.
    pub fn feature_flags(&self) -> Option<FeatureFlags> {
        self.flags
    }

    fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<Step<'a>, CatarError> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => {
                if !self.collect(ElementHeader::BYTES, input) {
                    return Ok(Step::Starved);
                }
                let header = self.buffer.first_chunk().ok_or(CatarError::Truncated("an element"))?;
                self.state = State::HeaderRead(ElementHeader::parse(header)?);
                Ok(Step::On)
            }
            State::HeaderRead(header) => self.header(header),
            State::Body(header) => {
                if !self.collect(header.small_size()?, input) {
                    self.state = State::Body(header);
                    return Ok(Step::Starved);
                }
                let element = std::mem::take(&mut self.buffer);
                let step = self.body(header, &element);
                self.buffer = element;
                self.buffer.clear();
                step
            }
            State::Payload(0) => {
                self.state = State::NodeEnd(None);
                Ok(Step::On)
            }
            State::Payload(left) => {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                let (piece, rest) = input.split_at(n);
                *input = rest;
                self.offset += n as u64;
                self.state = State::Payload(left - n as u64);
                Ok(if n == 0 { Step::Starved } else { Step::Event(Event::Payload(piece)) })
            }
            State::NodeEnd(next) => self.node_end(next),
            State::Complete => {
                self.state = State::Complete;
                match input.is_empty() {
                    true => Ok(Step::Starved),
                    false => Err(CatarError::Invalid("bytes behind the end of the archive")),
                }
            }
            State::Failed(error) => Err(error),
        }
    }

    /// Moves input into the buffer until it holds `size` bytes.
    fn collect(&mut self, size: usize, input: &mut &[u8]) -> bool {
        let n = size.saturating_sub(self.buffer.len()).min(input.len());
        let (piece, rest) = input.split_at(n);
        self.buffer.extend_from_slice(piece);
        self.offset += n as u64;
        *input = rest;
        self.buffer.len() >= size
    }

    /// Where the element in the buffer starts.
    fn element_offset(&self) -> u64 {
        self.offset - self.buffer.len() as u64
    }

    /// A header was read: what the grammar makes of it.
    fn header<'a>(&mut self, header: ElementHeader) -> Result<Step<'a>, CatarError> {
        let unexpected = |place| Err(CatarError::Unexpected { found: header.kind, place });
        self.state = State::Body(header);
        if let Some(building) = &self.building {
            if building.builder.is_inline(header.kind) {
                return Ok(Step::On);
            }
            return self.start_node(header, &[]);
        }
        match (self.name.take(), header.kind) {
            (Some(name), Kind::Filename | Kind::Goodbye) => {
                let end = self.element_offset();
                self.remember_child(Some(&name), end);
                self.state = State::HeaderRead(header);
                Ok(Step::Event(Event::Orphan { name: name.name }))
            }
            (Some(name), Kind::Entry) => {
                self.name = Some(name);
                Ok(Step::On)
            }
            (Some(_), _) => unexpected("behind a file name"),
            (None, Kind::Entry) if self.directories.is_empty() => Ok(Step::On),
            (None, _) if self.directories.is_empty() => unexpected("where the archive starts"),
            (None, Kind::Filename) => Ok(Step::On),
            (None, Kind::Goodbye) => {
                // Checked before the table is collected, so that its size is warranted by the children seen.
                let n_children = self.directories.last().map_or(0, |directory| directory.children.len());
                let least = ElementHeader::BYTES + Tail::BYTES;
                match header.size == (least + Item::BYTES * n_children) as u64 {
                    true => Ok(Step::On),
                    false => Err(CatarError::Goodbye("it does not have one item for each child")),
                }
            }
            (None, _) => unexpected("in a directory"),
        }
    }

    /// An element that is read as a whole was read.
    fn body<'a>(&mut self, header: ElementHeader, element: &[u8]) -> Result<Step<'a>, CatarError> {
        let body = element.get(ElementHeader::BYTES..).unwrap_or(&[]);
        let element_offset = self.offset - element.len() as u64;
        match header.kind {
            Kind::Filename => {
                self.name = Some(Name { name: filename_body(body)?, filename_offset: element_offset });
            }
            Kind::Entry => {
                let builder = NodeBuilder::new(body)?;
                let (first, later) = (self.flags, builder.entry().feature_flags);
                match first {
                    Some(first) if first != later => {
                        return Err(CatarError::FlagsDiffer { first: first.0, later: later.0 });
                    }
                    _ => self.flags = Some(later),
                }
                self.building = Some(Building { builder, entry_offset: element_offset });
            }
            Kind::Goodbye => {
                self.check_goodbye(element, element_offset)?;
                self.state = State::NodeEnd(None);
            }
            kind if kind.is_metadata() => {
                if let Some(building) = &mut self.building {
                    building.builder.metadata(kind, body)?;
                }
            }
            _ => return self.start_node(header, body),
        }
        Ok(Step::On)
    }

    /// The metadata of a node is complete; `next` is the element behind it, whose body is given if it is part of the
    /// node.
    fn start_node<'a>(&mut self, next: ElementHeader, body: &[u8]) -> Result<Step<'a>, CatarError> {
        let Some(Building { builder, entry_offset }) = self.building.take() else {
            return Err(CatarError::Unexpected { found: next.kind, place: "outside of a node" });
        };
        let node = Box::new(builder.finish(Some(next), body)?);
        let name = self.name.take();
        let filename_offset = name.as_ref().map(|name| name.filename_offset);
        let event_name = name.as_ref().map(|name| name.name.clone());
        match node.content {
            Content::Directory { .. } => {
                if self.directories.len() >= self.options.max_depth {
                    return Err(CatarError::TooDeep(self.options.max_depth));
                }
                self.directories.push(Directory { name, entry_offset, children: Vec::new() });
                self.state = State::HeaderRead(next);
            }
            Content::Payload { size, .. } => {
                self.open_leaf = Some(name);
                self.buffer.clear();
                self.state = State::Payload(size);
            }
            Content::Symlink(_) | Content::Device { .. } => {
                self.open_leaf = Some(name);
                self.state = State::NodeEnd(None);
            }
            Content::None => {
                self.open_leaf = Some(name);
                self.state = State::NodeEnd(Some(next));
            }
        }
        Ok(Step::Event(Event::Node { name: event_name, filename_offset, entry_offset, node }))
    }

    fn node_end<'a>(&mut self, next: Option<ElementHeader>) -> Result<Step<'a>, CatarError> {
        let end = if next.is_some() { self.element_offset() } else { self.offset };
        let name = match self.open_leaf.take() {
            Some(name) => name,
            None => self.directories.pop().and_then(|directory| directory.name),
        };
        self.remember_child(name.as_ref(), end);
        self.state = match (self.directories.is_empty(), next) {
            (true, Some(header)) => {
                return Err(CatarError::Unexpected { found: header.kind, place: "behind the root" });
            }
            (true, None) => State::Complete,
            (false, Some(header)) => State::HeaderRead(header),
            (false, None) => State::Header,
        };
        Ok(Step::Event(Event::NodeEnd { end }))
    }

    fn remember_child(&mut self, name: Option<&Name>, end: u64) {
        if let (Some(name), Some(directory)) = (name, self.directories.last_mut()) {
            let hash = name_hash(&name.name);
            directory.children.push(Child { hash, filename_offset: name.filename_offset, end });
        }
    }

    fn check_goodbye(&self, element: &[u8], goodbye_offset: u64) -> Result<(), CatarError> {
        let Some(directory) = self.directories.last() else { return Ok(()) };
        let table = GoodbyeTable::parse(element, goodbye_offset, directory.entry_offset)?;
        if !self.options.verify_goodbye {
            return Ok(());
        }
        if encode_goodbye(&directory.children, goodbye_offset, directory.entry_offset)? == element {
            return Ok(());
        }
        // Names with equal hashes may stand in another order: desync sorts them the other way round.
        if !table.is_search_tree() {
            return Err(CatarError::Goodbye("it is not in the order of a search tree"));
        }
        let key = |hash: u64, filename_offset: u64, end: u64| (hash, filename_offset, end);
        let mut told: Vec<_> = table.items().iter().map(|i| key(i.hash, i.filename_offset, i.end)).collect();
        let mut seen: Vec<_> = directory.children.iter().map(|c| key(c.hash, c.filename_offset, c.end)).collect();
        told.sort_unstable();
        seen.sort_unstable();
        match told == seen {
            true => Ok(()),
            false => Err(CatarError::Goodbye("it does not describe the children before it")),
        }
    }
}
