//! Which text format a client wants (RFC 9110, section 12.5.1).

/// A text format for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' older one, version 0.0.4.
    Plain,
}

impl Format {
    /// What it is called in HTTP.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The one that the header `Accept` prefers, OpenMetrics if it has no preference; `None`: it takes neither.
    pub(super) fn preferred(accept: &str) -> Option<Self> {
        let ranges: Vec<_> = accept.split(',').filter_map(Range::parse).collect();
        if ranges.is_empty() {
            return Some(Self::OpenMetrics);
        }
        let open_metrics = Self::OpenMetrics.quality(&ranges);
        let plain = Self::Plain.quality(&ranges);
        if open_metrics <= 0.0 && plain <= 0.0 {
            return None;
        }
        Some(if plain > open_metrics {
            Self::Plain
        } else {
            Self::OpenMetrics
        })
    }

    /// The quality of the most specific range that includes it; 0: none does.
    fn quality(self, ranges: &[Range<'_>]) -> f32 {
        let (kind, subtype, version) = match self {
            Self::OpenMetrics => ("application", "openmetrics-text", "1.0.0"),
            Self::Plain => ("text", "plain", "0.0.4"),
        };
        let specific = |range: &Range<'_>| match (range.kind.as_str(), range.subtype.as_str(), range.version) {
            (a, b, Some(wanted)) if a == kind && b == subtype => (wanted == version).then_some(4),
            (a, b, None) if a == kind && b == subtype => Some(3),
            (a, "*", _) if a == kind => Some(2),
            ("*", "*", _) => Some(1),
            _ => None,
        };
        let including = ranges
            .iter()
            .filter_map(|range| Some((specific(range)?, range.quality)));
        including
            .max_by_key(|(specific, _)| *specific)
            .map_or(0.0, |(_, quality)| quality)
    }
}

struct Range<'a> {
    kind: String,
    subtype: String,
    version: Option<&'a str>,
    quality: f32,
}

impl<'a> Range<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subtype) = parts.next()?.split_once('/')?;
        let (mut version, mut quality) = (None, 1.0);
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            match name.to_ascii_lowercase().as_str() {
                "version" => version = Some(value.trim_matches('"')),
                "q" => quality = value.parse().unwrap_or(0.0),
                _ => {}
            }
        }
        Some(Self {
            kind: kind.to_ascii_lowercase(),
            subtype: subtype.to_ascii_lowercase(),
            version,
            quality,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_gets_the_format_that_it_prefers() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (accept, expected) in [
            ("", Some(Format::OpenMetrics)),
            ("*/*", Some(Format::OpenMetrics)),
            (prometheus, Some(Format::OpenMetrics)),
            ("application/openmetrics-text", Some(Format::OpenMetrics)),
            ("text/plain", Some(Format::Plain)),
            (
                "text/plain;version=0.0.4;q=0.6, application/openmetrics-text;q=0.5",
                Some(Format::Plain),
            ),
            ("text/html,application/xhtml+xml,*/*;q=0.8", Some(Format::OpenMetrics)),
            ("TEXT/*; Q=0.5", Some(Format::Plain)),
            ("application/openmetrics-text;q=0,*/*", Some(Format::Plain)),
            ("application/openmetrics-text;version=2.0.0", None),
            ("application/json", None),
            ("*/*;q=0", None),
            ("*/*;q=x", None),
        ] {
            assert_eq!(Format::preferred(accept), expected, "{accept:?}");
        }
    }
}
