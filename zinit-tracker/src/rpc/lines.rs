//! Lines from a stream, as long as they may be and no longer.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// What there is room for in one read, at least.
const READ_SIZE: usize = 16 * 1024;

/// What a stream brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line without its end.
    Text(Vec<u8>),
    /// A line that was too long; it has been passed over.
    TooLong,
}

/// Cuts a stream into lines. Never holds much more than the longest line.
#[derive(Debug)]
pub(super) struct Lines<R> {
    stream: R,
    longest: usize,
    buffer: Vec<u8>,
    /// How much of the buffer is known to have no end of a line.
    searched: usize,
    /// The present line is too long already.
    skipping: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(stream: R, longest: usize) -> Self {
        Self {
            stream,
            longest,
            buffer: Vec::new(),
            searched: 0,
            skipping: false,
        }
    }

    /// The next line; `None` at the end of the stream. What comes behind the last end of a line is a line as well.
    ///
    /// Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.take() {
                return Ok(Some(line));
            }
            self.buffer.reserve(READ_SIZE);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(self.rest());
            }
        }
    }

    fn take(&mut self) -> Option<Line> {
        let found = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n');
        let Some(length) = found.map(|position| self.searched + position) else {
            if self.skipping || self.buffer.len() > self.longest {
                self.skipping = true;
                self.buffer.clear();
            }
            self.searched = self.buffer.len();
            return None;
        };
        let mut line: Vec<_> = self.buffer.drain(..=length).collect();
        line.pop();
        self.searched = 0;
        if std::mem::take(&mut self.skipping) || line.len() > self.longest {
            return Some(Line::TooLong);
        }
        if self.buffer.is_empty() {
            // A long line must not cost memory for the rest of the connection.
            self.buffer = Vec::new();
        }
        Some(Line::Text(line))
    }

    fn rest(&mut self) -> Option<Line> {
        self.searched = 0;
        let rest = std::mem::take(&mut self.buffer);
        if std::mem::take(&mut self.skipping) {
            Some(Line::TooLong)
        } else if rest.is_empty() {
            None
        } else {
            Some(Line::Text(rest))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(bytes: &[u8], longest: usize) -> Vec<Line> {
        let mut lines = Lines::new(bytes, longest);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            found.push(line);
            assert!(lines.buffer.capacity() <= 2 * (longest + 2 * READ_SIZE));
        }
        found
    }

    fn text(bytes: &[u8]) -> Line {
        Line::Text(bytes.to_vec())
    }

    #[tokio::test]
    async fn a_stream_is_cut_into_lines() {
        assert_eq!(
            lines(b"a\n\nbc\nd", 10).await,
            [text(b"a"), text(b""), text(b"bc"), text(b"d")]
        );
        assert_eq!(lines(b"", 10).await, []);
        assert_eq!(lines(b"\n", 10).await, [text(b"")]);
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_is_passed_over() {
        for length in [11, READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 10 * READ_SIZE] {
            let long = "x".repeat(length);
            let input = format!("a\n{long}\nb\n{long}");
            let expected = [text(b"a"), Line::TooLong, text(b"b"), Line::TooLong];
            assert_eq!(lines(input.as_bytes(), 10).await, expected, "{length}");
        }
        assert_eq!(lines(b"0123456789\n", 10).await, [text(b"0123456789")]);
    }

    #[tokio::test]
    async fn lines_may_come_byte_by_byte() {
        let (mut writer, reader) = tokio::io::duplex(1);
        let write = async {
            use tokio::io::AsyncWriteExt as _;
            writer.write_all(b"first\nsecond\n").await.unwrap();
            drop(writer);
        };
        let read = async {
            let mut lines = Lines::new(reader, 10);
            let mut found = Vec::new();
            while let Some(line) = lines.next().await.unwrap() {
                found.push(line);
            }
            found
        };
        let (found, ()) = tokio::join!(read, write);
        assert_eq!(found, [text(b"first"), text(b"second")]);
    }
}
