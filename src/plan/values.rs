//! Values of a plan that are more than text: sizes, durations, times of the day.

use std::time::Duration;

/// Parses a size: a number of bytes, or one with a unit: `4096`, `4K`, `4KiB`, `64M`, `1.5GiB`. K, M, G and T are powers
/// of 1024, as in rbd; KB, MB, GB and TB are refused, because people mean both by them. A broken number is rounded down
/// to whole bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err("write a number of bytes, or one with K, M, G or T (powers of 1024), such as 64M".into()),
    };
    let no_number = || "it does not begin with a number that fits in 64 bits".to_owned();
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(whole, rest)| (whole, Some(rest)));
    let whole: u64 = whole.parse().map_err(|_| no_number())?;
    let size = whole.checked_mul(1 << shift);
    let rest = match fraction {
        None => 0,
        // Nine digits: times 2^40 they fit in 128 bits many times over.
        Some(fraction) if shift > 0 && (1..=9).contains(&fraction.len()) => {
            let parts: u128 = fraction.parse().map_err(|_| no_number())?;
            // Less than 2^40, as the fraction is less than 1.
            ((parts << shift) / 10u128.pow(fraction.len() as u32)) as u64
        }
        Some(_) => return Err(no_number()),
    };
    size.and_then(|size| size.checked_add(rest)).ok_or_else(|| "it does not fit in 64 bits".to_owned())
}

/// The units of a duration from the largest down, each in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Parses a duration: `30s`, `5m`, `2h`, `1d`, `80ms`, or several parts from the largest unit down, as `1h30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write a number with d, h, m, s or ms, or several from the largest down, such as 1h30m".to_owned();
    let mut rest = text;
    let mut total: u64 = 0;
    let mut units = UNITS.iter();
    while !rest.is_empty() || total == 0 {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, behind) = rest.split_at(digits);
        let letters = behind.len() - behind.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, behind) = behind.split_at(letters);
        // The iterator goes on from the last unit: none comes twice, none out of order.
        let (_, length) = units.find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        total = number.checked_mul(*length).and_then(|part| total.checked_add(part)).ok_or("it is far too long")?;
        rest = behind;
        if rest.is_empty() {
            break;
        }
    }
    Ok(Duration::from_millis(total))
}

/// A duration as [`parse_duration`] takes it: `1h30m`, `80ms`, `0s`. What is finer than a millisecond is dropped.
pub fn duration_text(duration: Duration) -> String {
    let mut left = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, length) in UNITS {
        if left >= length {
            text.push_str(&format!("{}{unit}", left / length));
            left %= length;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

/// A size as [`parse_size`] takes it, exactly: `64M`, `1536K`, `1000`.
pub fn size_text(bytes: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let fitting = units.iter().find(|(_, shift)| bytes > 0 && bytes.is_multiple_of(1u64 << shift));
    fitting.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

/// Parses a part of the day, `22:00-06:00`: the minutes since midnight at which it begins and ends. `24:00` is midnight.
pub(super) fn parse_window(text: &str) -> Result<(u16, u16), String> {
    let wrong = || "write two times of the day, such as 22:00-06:00".to_owned();
    let (from, until) = text.split_once('-').ok_or_else(wrong)?;
    let minute = |time: &str| {
        let two = |digits: &str| match digits.as_bytes() {
            [a, b] if a.is_ascii_digit() && b.is_ascii_digit() => digits.parse::<u16>().ok(),
            _ => None,
        };
        let (hour, minute) = time.split_once(':')?;
        let (hour, minute) = (two(hour)?, two(minute)?);
        ((hour < 24 && minute < 60) || (hour, minute) == (24, 0)).then_some(hour * 60 + minute)
    };
    let (from, until) = (minute(from).ok_or_else(wrong)?, minute(until).ok_or_else(wrong)?);
    let (from, until) = (from % 1440, until % 1440);
    if from == until {
        return Err("it is empty, or the whole day: leave the window out and set the limit outside of it".into());
    }
    Ok((from, until))
}

/// A part of the day as a plan has it, `22:00-06:00`; minutes since midnight.
pub fn window_text(from_minute: u16, until_minute: u16) -> String {
    let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
    format!("{}-{}", time(from_minute), time(until_minute))
}

/// Whether a name fits a pattern in which `*` stands for any characters and `?` for one. In time that grows with the
/// product of both lengths, whatever they are.
pub fn matches_glob(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    // Which beginnings of the pattern fit what was seen of the name so far.
    let mut fits = vec![false; pattern.len() + 1];
    fits[0] = true;
    for (at, &c) in pattern.iter().enumerate() {
        fits[at + 1] = fits[at] && c == '*';
    }
    for character in name.chars() {
        let mut before = std::mem::replace(&mut fits[0], false);
        for (at, &c) in pattern.iter().enumerate() {
            let fitted = fits[at + 1];
            fits[at + 1] = match c {
                '*' => fits[at] || fitted,
                '?' => before,
                c => before && c == character,
            };
            before = fitted;
        }
    }
    fits[pattern.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (pattern, name, fits) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("volume-*", "volume-1", true),
            ("volume-*", "my-volume-1", false),
            ("*-root", "web-1-root", true),
            ("w?b", "web", true),
            ("w?b", "wb", false),
            ("*a*b", "xaybzb", true),
            ("*a*b", "xaybz", false),
            ("ä?", "äö", true),
        ] {
            assert_eq!(matches_glob(pattern, name), fits, "{pattern} {name}");
        }
        assert!(!matches_glob(&"*a".repeat(1000), &"a".repeat(999)));
    }

    #[test]
    fn sizes_may_be_broken_numbers_and_never_overflow() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4KiB", 4096),
            ("64M", 64 << 20),
            ("1gib", 1 << 30),
            ("2T", 2 << 40),
            ("1.5G", 3 << 29),
            ("0.1K", 102),
            ("16777215.999999999T", 18_446_744_073_709_550_516),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5",
            ".5M",
            "1.M",
            "1..5M",
            "1.0000000000M",
            "1 M",
            "4KB",
            "64MB",
            "16777216T",
            "18446744073709551616",
            "0x10",
            "1e3",
            "∞",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_have_their_units_in_order() {
        let ms = Duration::from_millis;
        for (text, duration) in [
            ("30s", ms(30_000)),
            ("5m", ms(300_000)),
            ("2h", ms(7_200_000)),
            ("1d", ms(86_400_000)),
            ("80ms", ms(80)),
            ("1h30m", ms(5_400_000)),
            ("1d2h3m4s5ms", ms(93_784_005)),
            ("0s", ms(0)),
        ] {
            assert_eq!(parse_duration(text), Ok(duration), "{text}");
        }
        for text in [
            "",
            "5",
            "m",
            "5 m",
            "30m1h",
            "1h1h",
            "1.5h",
            "-5m",
            "5M",
            "5min",
            "1h30",
            "99999999999999d",
            "0s0",
            "5m ",
            "1ms1s",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_of_the_day_are_two_digits_each() {
        assert_eq!(parse_window("22:00-06:30"), Ok((1320, 390)));
        assert_eq!(parse_window("00:00-24:00").unwrap_err(), parse_window("08:00-08:00").unwrap_err());
        assert_eq!(parse_window("18:00-24:00"), Ok((1080, 0)));
        for text in ["", "22:00", "22-06", "24:01-06:00", "22:60-23:00", "+2:00-03:00", "2:00-3:00", "22:00-06:00-"] {
            assert!(parse_window(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(ms in any::<u64>(), bytes in any::<u64>(), shift in 0u32..64) {
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(parse_duration(&duration_text(duration)), Ok(duration));
            let bytes = bytes >> shift << (shift / 2);
            prop_assert_eq!(parse_size(&size_text(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,12}", digits in "[0-9.:hmsdMG-]{0,16}") {
            for text in [text, digits] {
                let _ = (parse_size(&text), parse_duration(&text), parse_window(&text));
            }
        }
    }
}
