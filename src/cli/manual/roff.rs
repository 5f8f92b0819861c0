//! Prose to man(7): a small part of Markdown, since the same texts are read by people and by the test that runs their examples.
//!
//! `# SECTION`, `## Subsection`, paragraphs, `- items`, a term with `: what it is` in the next line, fenced blocks, `` `literal` `` and
//! `*placeholder*`; `{{name}}` on a line of its own is a part that is made elsewhere.

/// A text of prose as part of a page. `generated` gives the parts that are made elsewhere.
pub fn render(source: &str, generated: &dyn Fn(&str) -> Option<String>) -> String {
    let mut page = Renderer::default();
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with("```")).collect();
            page.block(&block);
            continue;
        }
        if let Some(name) = line.strip_prefix("{{").and_then(|line| line.strip_suffix("}}")) {
            page.end_paragraph();
            page.text.push_str(&generated(name).unwrap_or_else(|| format!("{{{{{name}}}}}\n")));
            continue;
        }
        if let Some(what) = line.strip_prefix(": ") {
            page.term(what);
            continue;
        }
        match line {
            "" => page.end_paragraph(),
            _ if line.starts_with("# ") => page.heading("SH", &line[2..]),
            _ if line.starts_with("## ") => page.heading("SS", &line[3..]),
            _ if line.starts_with("- ") => page.item(&line[2..]),
            _ => page.paragraph.push(line.trim().to_owned()),
        }
    }
    page.end_paragraph();
    page.text
}

/// A text as man(7) shows it: nothing in it means anything.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 8);
    for (n, c) in text.chars().enumerate() {
        match c {
            '\\' => escaped.push_str("\\e"),
            '-' => escaped.push_str("\\-"),
            '\'' => escaped.push_str("\\(aq"),
            '`' => escaped.push_str("\\(ga"),
            '^' => escaped.push_str("\\(ha"),
            '~' => escaped.push_str("\\(ti"),
            '"' => escaped.push_str("\\(dq"),
            // At the beginning of a line it would be a command.
            '.' if n == 0 => escaped.push_str("\\&."),
            c => escaped.push(c),
        }
    }
    ascii(&escaped)
}

/// The text with every character that is not ASCII by its number, which needs no guess at the encoding of the page.
pub fn ascii(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut ascii, c| {
        match c.is_ascii() {
            true => ascii.push(c),
            false => ascii.push_str(&format!("\\[u{:04X}]", u32::from(c))),
        }
        ascii
    })
}

/// What is typed as it stands.
pub fn bold(text: &str) -> String {
    format!("\\fB{}\\fR", escaped(text))
}

/// What stands for something else.
pub fn italic(text: &str) -> String {
    format!("\\fI{}\\fR", escaped(text))
}

#[derive(Default)]
struct Renderer {
    text: String,
    paragraph: Vec<String>,
    /// What stands in front of the paragraph.
    mark: Option<String>,
    /// Whether a section has just begun, which needs no further gap.
    is_fresh: bool,
}

impl Renderer {
    fn end_paragraph(&mut self) {
        let lines = std::mem::take(&mut self.paragraph);
        let mark = self.mark.take();
        if lines.is_empty() {
            return;
        }
        match mark {
            Some(mark) => self.text.push_str(&mark),
            None if self.is_fresh => {}
            None => self.text.push_str(".PP\n"),
        }
        self.is_fresh = false;
        self.text.push_str(&inline(&lines.join("\n")));
        self.text.push('\n');
    }

    fn heading(&mut self, command: &str, title: &str) {
        self.end_paragraph();
        self.text.push_str(&format!(".{command} {}\n", quoted(title)));
        self.is_fresh = true;
    }

    fn item(&mut self, text: &str) {
        self.end_paragraph();
        self.mark = Some(".IP \\(bu 2\n".to_owned());
        self.paragraph.push(text.to_owned());
    }

    /// The paragraph so far is a term; what it is begins.
    fn term(&mut self, what: &str) {
        let term = std::mem::take(&mut self.paragraph).join(" ");
        self.mark = Some(format!(".TP\n{}\n", inline(&term)));
        self.paragraph.push(what.to_owned());
    }

    fn block(&mut self, lines: &[&str]) {
        self.end_paragraph();
        self.text.push_str(".PP\n.RS 4\n.EX\n");
        for line in lines {
            self.text.push_str(&escaped(line));
            self.text.push('\n');
        }
        self.text.push_str(".EE\n.RE\n");
        self.is_fresh = false;
    }
}

fn quoted(title: &str) -> String {
    if title.contains(' ') { format!("\"{}\"", escaped(title)) } else { escaped(title) }
}

/// A paragraph's text with its marks.
fn inline(text: &str) -> String {
    let mut out = String::new();
    for (n, piece) in text.split('`').enumerate() {
        if n % 2 == 1 {
            out.push_str(&bold(piece));
            continue;
        }
        for (n, piece) in piece.split('*').enumerate() {
            out.push_str(&if n % 2 == 1 { italic(piece) } else { lines_escaped(piece) });
        }
    }
    out
}

/// Running text of several lines: a line that begins like a command does not become one.
fn lines_escaped(text: &str) -> String {
    let mut lines = text.split('\n');
    let first = lines.next().unwrap_or_default();
    lines.fold(escaped(first), |mut all, line| {
        all.push('\n');
        all.push_str(&escaped(line));
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_becomes_a_page() {
        let source = "# FILES\n\nSome *FILE* and `--flag`.\nMore.\n\n`/etc/x`\n: What it is\nat length.\n\n- one\n- two\n\n```sh\n.x -a 'b'\n```\n\nEnd.\n{{part}}\n";
        let page = render(source, &|name| (name == "part").then(|| "made\n".to_owned()));
        assert_eq!(
            page,
            ".SH FILES\nSome \\fIFILE\\fR and \\fB\\-\\-flag\\fR\\&.\nMore.\n.TP\n\\fB/etc/x\\fR\nWhat it is\nat length.\n\
             .IP \\(bu 2\none\n.IP \\(bu 2\ntwo\n.PP\n.RS 4\n.EX\n\\&.x \\-a \\(aqb\\(aq\n.EE\n.RE\n.PP\nEnd.\nmade\n"
        );
    }

    #[test]
    fn nothing_in_a_text_is_a_command() {
        assert_eq!(escaped(".SH"), "\\&.SH");
        assert_eq!(escaped("\\fB"), "\\efB");
        assert_eq!(escaped("a…"), "a\\[u2026]");
        assert_eq!(inline("a\n.b\n'c"), "a\n\\&.b\n\\(aqc");
    }
}
