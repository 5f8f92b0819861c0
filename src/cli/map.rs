//! `caifs map`: which parts of an image or archive are present, in the terminal and as a picture.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::figures::{bytes, count, percent, safe};
use super::runtime_dir::runtime_dir;
use crate::mount::control::client::{ask_place, place_of, wrong_reply};
use crate::mount::control::protocol::{Cell, MAX_CELLS, Map};
use crate::mount::control::{Reply, Request};
use crate::pack::output::AtomicFile;
use crate::sys::terminal_size;

/// Cells a line when the terminal does not tell its width.
const DEFAULT_WIDTH: u16 = 64;

/// Lines of a map in the terminal.
const N_LINES: u32 = 16;

/// Cells of a picture, and how many of them stand side by side.
const PICTURE_CELLS: u32 = 2048;
const PICTURE_COLUMNS: u32 = 64;

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
pub struct MapArgs {
    /// The mountpoint.
    #[arg(value_name = "DIR")]
    pub mountpoint: PathBuf,
    /// Of a mount of many indexes: the one at this path in the mount.
    #[arg(long, value_name = "PATH")]
    pub part: Option<String>,
    /// Write a picture (SVG) to this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Characters a line [default: the width of the terminal].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(8..=256))]
    pub width: Option<u16>,
    /// Print the cells as JSON.
    #[arg(long, conflicts_with = "svg")]
    pub json: bool,
}

pub fn run(args: &MapArgs) -> Result<()> {
    let stdout = std::io::stdout();
    let is_terminal = stdout.is_terminal();
    let of_terminal = || terminal_size(stdout.as_fd()).map(|(columns, _)| columns.saturating_sub(12).clamp(8, 256));
    let width = args.width.or_else(of_terminal).unwrap_or(DEFAULT_WIDTH);
    let n_cells = match args.svg {
        Some(_) => PICTURE_CELLS,
        None => (u32::from(width) * N_LINES).min(MAX_CELLS / u32::from(width) * u32::from(width)),
    };
    let dir = runtime_dir();
    let place = place_of(&dir, &args.mountpoint)?;
    let map = match ask_place(&dir, &place, &Request::Map { part: args.part.clone(), cells: n_cells })? {
        Reply::Map(map) => map,
        Reply::Status(_) | Reply::Changed(_) => return Err(wrong_reply(&dir, &place).into()),
    };
    if let Some(path) = &args.svg {
        let mut file = AtomicFile::create(path, 0o666)?;
        file.write_all(svg(&map).as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(file.commit()?);
    }
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string(&map)?),
        false => text(&map, usize::from(width), is_terminal),
    };
    Ok(stdout.lock().write_all(text.as_bytes())?)
}

/// What a cell mostly is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fetching,
    Memory,
    Disk,
    /// A part of it is here.
    Partly,
    /// Read once, and here no more.
    Gone,
    /// Never read, not here.
    Never,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Memory, Self::Disk, Self::Partly, Self::Fetching, Self::Gone, Self::Never];

    fn of(cell: &Cell) -> Self {
        // Nearly all: chunks do not end where cells do.
        const FULL: f32 = 0.999;
        match cell {
            Cell { is_fetching: true, .. } => Self::Fetching,
            Cell { memory, .. } if *memory >= FULL => Self::Memory,
            // What is on disk is read fast, whether a part of it is in memory as well or not.
            Cell { any, .. } if *any >= FULL => Self::Disk,
            Cell { any, .. } if *any > 0.0 => Self::Partly,
            Cell { was_read: true, .. } => Self::Gone,
            _ => Self::Never,
        }
    }

    /// With and without colours.
    fn sign(self) -> (char, char) {
        match self {
            Self::Memory => ('█', '#'),
            Self::Disk => ('█', '='),
            Self::Partly => ('▄', '-'),
            Self::Fetching => ('█', '*'),
            Self::Gone => ('░', '~'),
            Self::Never => ('·', '.'),
        }
    }

    /// SGR parameters.
    fn colour(self) -> &'static str {
        match self {
            Self::Memory => "32",
            Self::Disk | Self::Partly => "34",
            Self::Fetching => "33",
            Self::Gone => "35",
            Self::Never => "90",
        }
    }

    fn fill(self) -> &'static str {
        match self {
            Self::Memory => "#2e9e4f",
            Self::Disk => "#2f6fd0",
            Self::Partly => "#9dbdf0",
            Self::Fetching => "#e8b000",
            Self::Gone => "#b58bd6",
            Self::Never => "#e3e3e3",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "in memory",
            Self::Disk => "on disk",
            Self::Partly => "partly here",
            Self::Fetching => "being fetched",
            Self::Gone => "read, gone again",
            Self::Never => "never read",
        }
    }
}

/// What it is a map of, in a line.
fn title(map: &Map) -> String {
    let chunks = if map.part.n_chunks > 0 { format!(", {} chunks", count(map.part.n_chunks)) } else { String::new() };
    let here = map.cells.iter().map(|cell| f64::from(cell.any)).sum::<f64>() / map.cells.len().max(1) as f64;
    let about = if map.is_estimate { "about " } else { "" };
    format!("{}: {}{chunks}, {about}{} present", safe(&map.part.location), bytes(map.part.size_bytes), percent(here))
}

/// The kinds that a map can show.
fn kinds(map: &Map) -> impl Iterator<Item = Kind> {
    let knows_reads = map.knows_reads;
    Kind::ALL.into_iter().filter(move |kind| knows_reads || *kind != Kind::Gone)
}

/// A kind's name; where nobody remembers reads, what is not here may have been read.
fn name(map: &Map, kind: Kind) -> &'static str {
    match kind {
        Kind::Never if !map.knows_reads => "not here",
        kind => kind.name(),
    }
}

/// The map as lines of so many characters, each behind the offset it begins at.
fn text(map: &Map, width: usize, colours: bool) -> String {
    let mut text = format!("{}\n", title(map));
    let n_cells = map.cells.len().max(1) as u128;
    for (line, cells) in map.cells.chunks(width).enumerate() {
        let offset = (u128::from(map.part.size_bytes) * (line * width) as u128 / n_cells) as u64;
        let _ = write!(text, "{:>11} ", bytes(offset));
        let mut last = "";
        for cell in cells {
            let kind = Kind::of(cell);
            if colours && kind.colour() != last {
                last = kind.colour();
                let _ = write!(text, "\x1b[{last}m");
            }
            text.push(if colours { kind.sign().0 } else { kind.sign().1 });
        }
        text.push_str(if colours { "\x1b[0m\n" } else { "\n" });
    }
    let legend: Vec<String> = kinds(map)
        .map(|kind| match colours {
            true => format!("\x1b[{}m{}\x1b[0m {}", kind.colour(), kind.sign().0, name(map, kind)),
            false => format!("{} {}", kind.sign().1, name(map, kind)),
        })
        .collect();
    let _ = writeln!(text, "{:>11} {}", "", legend.join("   "));
    text
}

/// The map as a picture that needs nothing else. Neighbours of one kind are one shape, so it stays small.
fn svg(map: &Map) -> String {
    const CELL: u32 = 12;
    const TOP: u32 = 34;
    let n_cells = u32::try_from(map.cells.len()).unwrap_or(u32::MAX);
    let (width, height) = (PICTURE_COLUMNS * CELL, n_cells.div_ceil(PICTURE_COLUMNS) * CELL);
    let mut text = String::new();
    let _ = writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <title>{2}</title>\n<text x=\"10\" y=\"22\">{2}</text>",
        width + 20,
        TOP + height + 34,
        escaped(&title(map))
    );
    for kind in Kind::ALL {
        let mut path = String::new();
        let mut cell = 0;
        while cell < n_cells {
            let row_end = (cell / PICTURE_COLUMNS + 1) * PICTURE_COLUMNS;
            let is_kind = |at: u32| map.cells.get(at as usize).is_some_and(|cell| Kind::of(cell) == kind);
            let end = (cell..row_end.min(n_cells)).find(|at| !is_kind(*at)).unwrap_or(row_end.min(n_cells));
            if end > cell {
                let (x, y) = (10 + cell % PICTURE_COLUMNS * CELL, TOP + cell / PICTURE_COLUMNS * CELL);
                let _ = write!(path, "M{x} {y}h{}v{}H{x}z", (end - cell) * CELL - 1, CELL - 1);
            }
            cell = end.max(cell + 1);
        }
        if !path.is_empty() {
            let _ = writeln!(text, "<path fill=\"{}\" d=\"{path}\"/>", kind.fill());
        }
    }
    let mut x = 10;
    let y = TOP + height + 8;
    for kind in kinds(map) {
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{}</text>",
            kind.fill(),
            x + 17,
            y + 11,
            name(map, kind)
        );
        x += 36 + 8 * name(map, kind).len() as u32;
    }
    text.push_str("</svg>\n");
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::control::protocol::PartStatus;

    fn map() -> Map {
        let cell = |memory: f32, disk: f32, is_fetching, was_read| Cell {
            memory,
            disk,
            any: memory.max(disk),
            is_fetching,
            was_read,
        };
        let cells = vec![
            cell(1.0, 0.0, false, true),
            cell(0.5, 1.0, false, true),
            cell(0.0, 0.5, false, true),
            cell(0.0, 0.0, true, false),
            cell(0.0, 0.0, false, true),
            cell(0.0, 0.0, false, false),
        ];
        let part = PartStatus {
            location: "/a & <b>.caibx".into(),
            size_bytes: 6 << 20,
            n_chunks: 96,
            ..PartStatus::default()
        };
        Map { part, cells, is_estimate: false, knows_reads: true }
    }

    #[test]
    fn every_kind_of_cell_is_told_apart() {
        let plain = text(&map(), 4, false);
        let wanted = "/a & <b>.caibx: 6.0 MiB, 96 chunks, 42 % present\n        0 B #=-*\n    4.0 MiB ~.\n            \
                      # in memory   = on disk   - partly here   * being fetched   ~ read, gone again   . never read\n";
        assert_eq!(plain, wanted);
        let coloured = text(&map(), 4, true);
        assert!(coloured.contains("\x1b[32m█\x1b[34m█▄\x1b[33m█\x1b[0m\n"), "{coloured:?}");
        let forgotten = text(&Map { knows_reads: false, ..map() }, 6, false);
        assert!(forgotten.contains(". not here") && !forgotten.contains("gone again"), "{forgotten}");
    }

    #[test]
    fn a_picture_stands_alone_and_is_small() {
        let picture = svg(&map());
        assert!(picture.starts_with("<svg xmlns=") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("/a &amp; &lt;b&gt;.caibx: 6.0 MiB"), "{picture}");
        for kind in Kind::ALL {
            assert_eq!(
                picture.matches(kind.fill()).count(),
                2,
                "{}: its cells and its place in the legend",
                kind.name()
            );
            assert!(picture.contains(kind.name()));
        }
        assert!(!picture.contains("href"));
        let large = Map { cells: vec![map().cells[0]; PICTURE_CELLS as usize], ..map() };
        assert!(svg(&large).len() < 4000, "{}", svg(&large).len());
    }
}
