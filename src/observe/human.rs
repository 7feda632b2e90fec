//! Bytes, rates and durations as a person reads them.

/// A number of bytes: `0 B`, `512 B`, `1.5 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().iec().to_string()
}

/// A number of bytes a second: `1.5 MiB/s`. What is no number, or below zero, is 0.
pub fn human_rate(bytes_per_second: f64) -> String {
    // A float becomes an integer by saturating, and what is no number becomes 0.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bytes = bytes_per_second.round() as u64;
    format!("{}/s", human_bytes(bytes))
}

/// A number of seconds, in its two largest units: `0.4 s`, `59 s`, `1 min 30 s`, `1 d 1 h`.
pub fn human_seconds(seconds: f64) -> String {
    if seconds > 0.0 && seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    human_duration(seconds.round() as u64)
}

/// A whole number of seconds, in its two largest units.
pub fn human_duration(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let Some(first) = UNITS.iter().position(|(length, _)| seconds >= *length) else { return "0 s".to_owned() };
    let mut left = seconds;
    let mut parts = Vec::new();
    for (length, unit) in UNITS.iter().skip(first).take(2) {
        if left >= *length {
            parts.push(format!("{} {unit}", left / length));
            left %= length;
        }
    }
    parts.join(" ")
}

/// A moment in RFC 3339, to the second; what is none is shown as it is, by [`plain`].
pub fn human_moment(text: &str) -> String {
    match text.parse::<jiff::Timestamp>() {
        Ok(at) => at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        Err(_) => plain(text),
    }
}

/// Text from outside without control characters, which could move the cursor or look like lines of ours.
pub fn plain(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_no_more_than_seconds() {
        assert_eq!(human_moment("2026-11-26T12:00:01.987654321Z"), "2026-11-26T12:00:01Z");
        assert_eq!(human_moment("2026-11-26T13:00:00+01:00"), "2026-11-26T12:00:00Z");
        assert_eq!(human_moment("soon\u{1b}"), "soon\u{fffd}");
    }

    #[test]
    fn bytes_are_told_in_powers_of_1024() {
        let told: Vec<_> = [0, 512, 1536, 4 << 20, 5 << 30].into_iter().map(human_bytes).collect();
        assert_eq!(told, ["0 B", "512 B", "1.5 KiB", "4.0 MiB", "5.0 GiB"]);
        let told: Vec<_> = [f64::NAN, -1.0, 0.4, 1536.0].into_iter().map(human_rate).collect();
        assert_eq!(told, ["0 B/s", "0 B/s", "0 B/s", "1.5 KiB/s"]);
    }

    #[test]
    fn durations_are_told_in_their_two_largest_units() {
        let told = [0.0, 0.44, 9.94, 9.96, 59.6, 90.0, 3_601.0, 90_061.0, 86_400.0].map(human_seconds);
        assert_eq!(told, ["0 s", "0.4 s", "9.9 s", "10 s", "1 min", "1 min 30 s", "1 h", "1 d 1 h", "1 d"]);
        assert_eq!([f64::NAN, -5.0].map(human_seconds), ["0 s", "0 s"]);
    }

    #[test]
    fn text_from_outside_stays_on_its_line() {
        assert_eq!(plain("a\u{1b}[31m\r\n  b"), "a\u{fffd}[31m b");
    }
}
