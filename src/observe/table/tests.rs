//! Tables, wide and narrow.

use super::*;
use crate::observe::tests::fleet::{server, status};

fn draw(status: &FleetStatus, width: usize) -> String {
    fleet_table(status, Look { width, colour: false, volumes: false })
}

fn golden(name: &str, text: &str) {
    insta::with_settings!({snapshot_path => "golden", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn a_wide_table() {
    golden("wide", &draw(&status(), 120));
}

#[test]
fn a_table_in_80_columns() {
    let text = draw(&status(), 80);
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    golden("80-columns", &text);
}

#[test]
fn a_narrow_list() {
    let text = draw(&status(), 44);
    assert!(text.lines().all(|line| line.chars().count() <= 44), "{text}");
    golden("narrow", &text);
}

#[test]
fn every_volume_if_asked_for() {
    let mut status = status();
    status.servers.truncate(1);
    golden("volumes", &fleet_table(&status, Look { width: 100, colour: false, volumes: true }));
}

#[test]
fn what_only_the_images_tell() {
    let mut status = status();
    (status.origin, status.worker, status.throttles) = (Origin::Images, None, Vec::new());
    for server in &mut status.servers {
        (server.change_rate, server.throughput, server.predicted_outage_seconds) = (None, None, None);
        (server.last_error, server.convergence) = (None, Convergence::Unknown);
        server.volumes.truncate(1);
    }
    status.servers[1].changed_bytes = None;
    status.servers[1].activity = Activity::NeverSynced;
    (status.servers[1].lag_seconds, status.servers[1].point) = (None, None);
    golden("images", &draw(&status, 100));
}

#[test]
fn an_empty_plan() {
    let mut status = status();
    (status.servers, status.throttles, status.worker) = (Vec::new(), Vec::new(), None);
    assert_eq!(draw(&status, 80), "0 servers; 0 B changed since their points\n");
}

#[test]
fn colours_only_where_wanted() {
    for width in [40, 120] {
        let coloured = fleet_table(&status(), Look { width, colour: true, volumes: false });
        assert!(coloured.contains("\u{1b}["), "{width}");
        assert!(!draw(&status(), width).contains('\u{1b}'), "{width}");
    }
}

#[test]
fn text_from_outside_moves_no_cursor_and_forges_no_line() {
    let mut status = status();
    let mut evil = server("a\u{1b}[2J\nb");
    evil.last_error =
        Some(ErrorStatus { at: "now\r".into(), message: "\u{7}x\n0 servers".into(), retryable: true, count: 1 });
    status.servers = vec![evil];
    for width in [20, 120] {
        let text = draw(&status, width);
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("0 servers")), "{text}");
    }
}

#[test]
fn no_width_is_too_small() {
    for width in [0, 1, 10, 79, 81, 1000] {
        assert!(draw(&status(), width).contains("db-1-data"));
    }
}

#[test]
fn a_long_word_keeps_its_line() {
    assert_eq!(wrapped("a bb ccccccccc d", 6), "a bb\n  ccccccccc\n  d\n");
}
