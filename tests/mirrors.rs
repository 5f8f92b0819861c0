//! Groups of mirrors and ordered stores whose members fail, hang, lag and lie; all in paused time, so that every span is exact.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caifs::digest::{ChunkId, Digest};
use caifs::store::fault::{Fault, FaultStore};
use caifs::store::mirror::{MemberHealth, MirrorGroup};
use caifs::store::router::{DEFAULT_PATIENCE, Router};
use caifs::store::{Fetched, Store, StoreError, Stored};
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use tokio::time::Instant;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// The longest a store is set aside, and so the longest until a mirror that is well again is noticed.
const LONGEST_ASIDE: Duration = Duration::from_secs(30);

/// A store whose fault can be changed, and that knows what became of its requests.
#[derive(Debug)]
struct Mirror {
    store: FaultStore,
    fault: Arc<Mutex<Fault>>,
    n_running: AtomicU64,
    most_running: AtomicU64,
    n_dropped: AtomicU64,
}

impl Mirror {
    fn new(name: &str, fault: Fault) -> Arc<Self> {
        let fault = Arc::new(Mutex::new(fault));
        let script = Arc::clone(&fault);
        Self::with_script(name, fault, move |_, _| *script.lock().unwrap())
    }

    /// A store that does as its script says, whatever is set.
    fn scripted(name: &str, script: impl Fn(ChunkId, u64) -> Fault + Send + Sync + 'static) -> Arc<Self> {
        Self::with_script(name, Arc::new(Mutex::new(Fault::None)), script)
    }

    fn with_script(
        name: &str,
        fault: Arc<Mutex<Fault>>,
        script: impl Fn(ChunkId, u64) -> Fault + Send + Sync + 'static,
    ) -> Arc<Self> {
        let store = FaultStore::new(name, script);
        store.insert(id(), PLAIN);
        let (n_running, most_running, n_dropped) = Default::default();
        Arc::new(Self { store, fault, n_running, most_running, n_dropped })
    }

    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    fn n(&self) -> u64 {
        self.store.n_fetches()
    }

    fn n_running(&self) -> u64 {
        self.n_running.load(Ordering::SeqCst)
    }
}

/// Counts a request out, and whether it came to its end.
struct Running<'a>(&'a Mirror, bool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.n_running.fetch_sub(1, Ordering::SeqCst);
        self.0.n_dropped.fetch_add(u64::from(!self.1), Ordering::SeqCst);
    }
}

impl Store for Mirror {
    fn name(&self) -> &str {
        self.store.name()
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let n_running = self.n_running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_running.fetch_max(n_running, Ordering::SeqCst);
            let mut running = Running(self, false);
            let answer = self.store.fetch(id).await;
            running.1 = true;
            answer
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        self.store.has(id)
    }
}

const PLAIN: &[u8] = b"a chunk on every mirror";

fn id() -> ChunkId {
    Digest::default().id(PLAIN)
}

fn group(mirrors: &[&Arc<Mirror>]) -> MirrorGroup {
    MirrorGroup::new(mirrors.iter().map(|&mirror| Arc::<Mirror>::clone(mirror) as Arc<dyn Store>).collect())
}

/// The name of the store that answered, and how long it took.
async fn timed(store: &dyn Store) -> (String, Duration) {
    let start = Instant::now();
    let fetched = store.fetch_avoiding(id(), &[]).await.unwrap().unwrap();
    assert_eq!(fetched.stored.bytes, PLAIN);
    (fetched.store, start.elapsed())
}

/// Fetches so often at this pace; who answered, each once if it did so several times in a row.
async fn fetch_all(store: &dyn Store, n: usize, pace: Duration) -> Vec<String> {
    let mut names = Vec::new();
    for _ in 0..n {
        names.push(timed(store).await.0);
        tokio::time::sleep(pace).await;
    }
    names.dedup();
    names
}

fn health(group: &MirrorGroup, index: usize) -> MemberHealth {
    group.members().remove(index)
}

#[tokio::test(start_paused = true)]
async fn the_first_of_healthy_mirrors_is_asked_and_no_other() {
    let (a, b) = (Mirror::new("a", Fault::Delay(10 * MS)), Mirror::new("b", Fault::None));
    let group = group(&[&a, &b]);
    assert_eq!(group.name(), "a|b");
    assert_eq!(fetch_all(&group, 100, MS).await, ["a"]);
    assert_eq!((a.n(), b.n()), (100, 0));
    assert_eq!(health(&group, 0).p95, Some(10 * MS));
    assert_eq!(health(&group, 1).p95, None);
    assert!(group.blocking().is_none());
}

#[tokio::test(start_paused = true)]
async fn missing_and_failing_mirrors_hand_on_at_once() {
    for fault in [Fault::Missing, Fault::Fail] {
        for other in [Fault::Missing, Fault::Fail] {
            let mirrors = [Mirror::new("a", fault), Mirror::new("b", other), Mirror::new("c", Fault::None)];
            let group = group(&mirrors.each_ref());
            assert_eq!(timed(&group).await, ("c".to_owned(), Duration::ZERO), "{fault:?} {other:?}");
            assert_eq!(mirrors.map(|mirror| mirror.n()), [1, 1, 1]);
            assert_eq!(group.has(id()).await, Ok(true));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn missing_is_said_only_if_every_mirror_says_so() {
    use Fault::{Fail, Missing};
    for faults in [[Missing, Missing], [Missing, Fail], [Fail, Missing], [Fail, Fail]] {
        let mirrors = [Mirror::new("a", faults[0]), Mirror::new("b", faults[1])];
        let group = group(&mirrors.each_ref());
        // Also when they are set aside.
        for _ in 0..5 {
            let fetched = group.fetch(id()).await;
            let has = group.has(id()).await;
            if faults == [Missing, Missing] {
                assert_eq!((fetched, has), (Ok(None), Ok(false)));
                continue;
            }
            let error = fetched.unwrap_err().to_string();
            assert_eq!(has.unwrap_err().to_string(), error);
            for (name, fault) in ["a: ", "b: "].iter().zip(faults) {
                assert_eq!(error.contains(name), fault == Fail, "{error}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failing_mirror_is_set_aside_and_probed_ever_more_seldom() {
    let (a, b) = (Mirror::new("a", Fault::Fail), Mirror::new("b", Fault::Delay(MS)));
    let group = group(&[&a, &b]);
    assert_eq!(fetch_all(&group, 5, Duration::ZERO).await, ["b"]);
    assert_eq!(a.n(), 3, "three errors in a row are enough");
    assert!(!health(&group, 0).is_healthy && health(&group, 1).is_healthy);
    assert!(health(&group, 0).set_aside_for.is_some_and(|span| span <= SECOND));

    // Ten minutes: spans of 0.5 to 1 s, 1 to 2 s, … and 15 to 30 s.
    assert_eq!(fetch_all(&group, 6000, 99 * MS).await, ["b"]);
    let n_probes = a.n() - 3;
    assert!((20..=50).contains(&n_probes), "{n_probes}");
    assert_eq!(health(&group, 0).n_failures, a.n());
}

#[tokio::test(start_paused = true)]
async fn a_mirror_that_is_well_again_has_its_old_place() {
    let (a, b) = (Mirror::new("a", Fault::Fail), Mirror::new("b", Fault::None));
    let group = group(&[&a, &b]);
    for fault in [Fault::Fail, Fault::Hang, Fault::Panic] {
        a.set(Fault::Fail);
        assert_eq!(fetch_all(&group, 10, MS).await, ["b"]);
        // A probe that hangs or panics is one that failed.
        a.set(fault);
        assert_eq!(fetch_all(&group, 100, SECOND).await, ["b"]);
        assert!(!health(&group, 0).is_healthy);
        a.set(Fault::None);
        let names = fetch_all(&group, 60, SECOND).await;
        assert_eq!(names.last().map(String::as_str), Some("a"), "{names:?}");
        let n_before = b.n();
        assert_eq!(fetch_all(&group, 100, SECOND).await, ["a"]);
        assert_eq!(b.n(), n_before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_mirror_that_lacks_a_chunk_is_not_sick() {
    let (a, b) = (Mirror::new("a", Fault::Missing), Mirror::new("b", Fault::None));
    let group = group(&[&a, &b]);
    assert_eq!(fetch_all(&group, 100, MS).await, ["b"]);
    assert_eq!((a.n(), health(&group, 0).n_failures), (100, 0));
}

#[tokio::test(start_paused = true)]
async fn a_black_hole_costs_its_readers_two_seconds_once_and_its_probes_nothing() {
    for n_good in [0, 100] {
        let (a, b) = (Mirror::new("a", Fault::Delay(10 * MS)), Mirror::new("b", Fault::Delay(10 * MS)));
        let group = group(&[&a, &b]);
        fetch_all(&group, n_good, MS).await;
        a.set(Fault::Hang);
        let mut waited = Duration::ZERO;
        while health(&group, 0).is_healthy {
            waited += timed(&group).await.1 - 10 * MS;
        }
        assert!(waited <= 2 * SECOND, "{waited:?}");
        a.most_running.store(0, Ordering::SeqCst);
        for _ in 0..10_000 {
            assert_eq!(timed(&group).await, ("b".to_owned(), 10 * MS));
            tokio::time::sleep(90 * MS).await;
        }
        assert_eq!(a.most_running.load(Ordering::SeqCst), 1, "one probe at a time");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hanging_mirror_does_not_hold_up_many_readers_at_once() {
    let (a, b) = (Mirror::new("a", Fault::Hang), Mirror::new("b", Fault::Delay(10 * MS)));
    let group = group(&[&a, &b]);
    let start = Instant::now();
    futures_util::future::join_all((0..64).map(|_| timed(&group))).await;
    assert!(start.elapsed() <= 2 * SECOND + 10 * MS, "{:?}", start.elapsed());
    assert_eq!((a.n(), a.n_running()), (64, 0), "what lost is dropped");
}

#[tokio::test(start_paused = true)]
async fn a_late_request_is_hedged_and_the_loser_dropped() {
    let (a, b) = (Mirror::new("a", Fault::Delay(40 * MS)), Mirror::new("b", Fault::Delay(10 * MS)));
    let group = group(&[&a, &b]);
    fetch_all(&group, 50, MS).await;
    a.set(Fault::Delay(10 * SECOND));
    assert_eq!(timed(&group).await, ("b".to_owned(), 60 * MS), "late after 40 ms and a quarter");
    assert_eq!((b.n(), a.n_running(), a.n_dropped.load(Ordering::SeqCst)), (1, 0, 1));
    assert_eq!(health(&group, 0).n_hedges, 1);

    // The first to answer wins, also if it is the late one.
    a.set(Fault::Delay(55 * MS));
    assert_eq!(timed(&group).await, ("a".to_owned(), 55 * MS));
    assert_eq!((b.n(), b.n_running(), b.n_dropped.load(Ordering::SeqCst)), (2, 0, 1));

    // A hedge that fails or finds nothing does not end the race.
    for fault in [Fault::Fail, Fault::Missing] {
        a.set(Fault::Delay(40 * MS));
        fetch_all(&group, 64, MS).await;
        a.set(Fault::Delay(55 * MS));
        b.set(fault);
        assert_eq!(timed(&group).await, ("a".to_owned(), 55 * MS));
    }
    assert_eq!(b.n(), 4);
}

#[tokio::test(start_paused = true)]
async fn hedges_stay_within_their_budget() {
    // Slow spells, rare enough to be forgotten in between.
    let a = Mirror::scripted("a", |_, n| Fault::Delay(if n % 150 < 30 { 500 * MS } else { 10 * MS }));
    let b = Mirror::new("b", Fault::Delay(10 * MS));
    let group = group(&[&a, &b]);
    for n in 1..=40 {
        fetch_all(&group, 100, MS).await;
        assert!(b.n() <= 4 + n * 100 / 16, "{} of {}", b.n(), n * 100);
        assert!(health(&group, 0).is_healthy);
    }
    assert!(b.n() > 100, "{} hedges", b.n());
}

#[tokio::test(start_paused = true)]
async fn a_slow_but_healthy_mirror_is_not_doubled_for_ever() {
    for latency in [100, 600, 3000] {
        let (a, b) = (Mirror::new("a", Fault::Delay(MS * latency)), Mirror::new("b", Fault::Delay(10 * MS)));
        let group = group(&[&a, &b]);
        fetch_all(&group, 200, 100 * MS).await;
        let n_before = b.n();
        assert_eq!(fetch_all(&group, 200, MS).await, ["a"], "{latency} ms");
        assert_eq!(b.n(), n_before, "{latency} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn reads_resume_by_themselves_when_the_network_is_back() {
    for fault in [Fault::Fail, Fault::Hang] {
        let (a, b) = (Mirror::new("a", Fault::Delay(10 * MS)), Mirror::new("b", Fault::Delay(20 * MS)));
        let group = group(&[&a, &b]);
        fetch_all(&group, 10, MS).await;
        a.set(fault);
        b.set(fault);
        for _ in 0..200 {
            // A reader with a deadline; not one of them is told that the chunk is missing.
            let read = tokio::time::timeout(5 * SECOND, group.fetch(id())).await;
            assert!(!matches!(read, Ok(Ok(_))), "{read:?}");
            tokio::time::sleep(100 * MS).await;
        }
        assert_eq!(a.n_running() + b.n_running(), 0);
        assert!(group.members().iter().all(|member| !member.is_healthy));
        a.set(Fault::Delay(10 * MS));
        b.set(Fault::Delay(20 * MS));
        assert!(timed(&group).await.1 <= 20 * MS, "the very next read");
        fetch_all(&group, 3, 30 * MS).await;
        assert_eq!(fetch_all(&group, 10, MS).await, ["a"], "and soon from the first mirror");
    }
}

#[tokio::test(start_paused = true)]
async fn of_mirrors_that_are_all_set_aside_one_that_hangs_is_not_waited_for() {
    let (a, b) = (Mirror::new("a", Fault::Fail), Mirror::new("b", Fault::Fail));
    let group = group(&[&a, &b]);
    for _ in 0..5 {
        group.fetch(id()).await.unwrap_err();
    }
    a.set(Fault::Hang);
    b.set(Fault::Delay(MS));
    assert!(timed(&group).await.1 <= 501 * MS);
}

#[tokio::test(start_paused = true)]
async fn a_mirror_that_gave_wrong_bytes_is_left_out_and_charged() {
    let (a, b) = (Mirror::new("a", Fault::None), Mirror::new("b", Fault::None));
    let group = group(&[&a, &b]);
    let fetched = group.fetch_avoiding(id(), &["a".to_owned()]).await.unwrap();
    assert_eq!(fetched.map(|fetched| fetched.store), Some("b".to_owned()));
    assert_eq!((a.n(), health(&group, 0).n_failures, health(&group, 0).is_healthy), (0, 1, true));
    assert_eq!(group.fetch_avoiding(id(), &["a".to_owned(), "b".to_owned()]).await, Ok(None));
    assert_eq!((a.n(), b.n()), (0, 1));
    b.set(Fault::Fail);
    assert!(group.fetch_avoiding(id(), &["a".to_owned()]).await.is_err());

    // Wrong bytes of one chunk after the other.
    for i in 0..2u8 {
        let other = Digest::default().id(&[i]);
        group.fetch_avoiding(other, &["a".to_owned()]).await.unwrap();
    }
    assert!(!health(&group, 0).is_healthy);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_goes_away_leaves_no_request() {
    let (a, b) = (Mirror::new("a", Fault::Hang), Mirror::new("b", Fault::Hang));
    let group = group(&[&a, &b]);
    assert!(tokio::time::timeout(SECOND, group.fetch(id())).await.is_err());
    assert_eq!((a.n(), b.n(), a.n_running(), b.n_running()), (1, 1, 0, 0));
}

#[tokio::test]
async fn groups_of_local_stores_are_read_in_order_on_the_calling_thread() {
    use caifs::store::local::LocalStore;
    use caifs::store::{Form, WriteStore};
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let stores = dirs.each_ref().map(|dir| LocalStore::open(dir.path()).unwrap().with_form(Form::Plain));
    let stored = Stored { form: Form::Plain, bytes: PLAIN.into() };
    stores[1].put(id(), stored.clone()).await.unwrap();
    let group = MirrorGroup::new(stores.iter().map(|store| Arc::new(store.clone()) as Arc<dyn Store>).collect());
    let blocking = group.blocking().unwrap();
    assert_eq!(blocking.fetch_now(id(), u64::MAX), Ok(Some(stored.clone())));
    assert_eq!(blocking.fetch_now(Digest::default().id(b"none"), u64::MAX), Ok(None));
    let fetched = group.fetch_avoiding(id(), &[]).await;
    assert_eq!(fetched, Ok(Some(Fetched { stored, store: dirs[1].path().display().to_string() })));
}

#[test]
fn groups_are_opened_as_mirrors_and_asked_in_order() {
    use caifs::store::location::Location;
    use caifs::store::open::{StoreSpec, open_stores};
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [a, b, c] = dirs.each_ref().map(|dir| dir.path().display().to_string());
    let spec = |path: &String| StoreSpec { location: Location::parse(path).unwrap(), options: Default::default() };
    let name = |groups: &[Vec<StoreSpec>]| open_stores(groups).unwrap().name().to_owned();
    assert_eq!(name(&[vec![spec(&a), spec(&b)], vec![spec(&c)]]), format!("{a}|{b}, {c}"));
    assert_eq!(name(&[vec![spec(&a), spec(&b)]]), format!("{a}|{b}"));
    assert_eq!(name(&[vec![spec(&c)]]), c);
}

#[tokio::test(start_paused = true)]
async fn a_router_asks_the_next_store_after_some_patience() {
    let hang = || Mirror::new("a", Fault::Hang);
    let (a, b, c) = (hang(), Mirror::new("b", Fault::Missing), Mirror::new("c", Fault::Delay(MS)));
    let stores = |mirrors: &[&Arc<Mirror>]| {
        mirrors.iter().map(|&mirror| Arc::<Mirror>::clone(mirror) as Arc<dyn Store>).collect::<Vec<_>>()
    };
    let router = Router::new(stores(&[&a, &b, &c]));
    assert_eq!(timed(&router).await, ("c".to_owned(), DEFAULT_PATIENCE + MS));
    assert_eq!((a.n_running(), b.n(), c.n()), (0, 1, 1));
    assert!(!router.members()[0].is_healthy);
    assert_eq!(timed(&router).await, ("c".to_owned(), MS), "a store that was silent is not waited for again");
    a.set(Fault::Delay(MS));
    tokio::time::sleep(LONGEST_ASIDE).await;
    timed(&router).await;
    tokio::time::sleep(MS).await;
    assert_eq!(timed(&router).await, ("a".to_owned(), MS));

    // A store that is slow is neither sick nor doubled.
    let slow = Mirror::new("slow", Fault::Delay(4900 * MS));
    let router = Router::new(stores(&[&slow, &c]));
    assert_eq!(fetch_all(&router, 20, MS).await, ["slow"]);
    let router = Router::with_patience(stores(&[&hang(), &c]), 2 * SECOND);
    assert_eq!(timed(&router).await.1, 2 * SECOND + MS);
}

/// What a member does with its next request.
fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::None),
        1 => Just(Fault::Missing),
        2 => Just(Fault::Fail),
        2 => Just(Fault::Flip),
        1 => Just(Fault::Truncate),
        1 => Just(Fault::Hang),
        2 => (1..5000u32).prop_map(|ms| Fault::Delay(MS * ms)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// As the cache asks: what is not what its id says is asked for again, from others.
    #[test]
    fn a_group_with_a_healthy_mirror_always_gives_the_chunk(
        faults in proptest::collection::vec(proptest::collection::vec(any_fault(), 1..20), 2..4),
        healthy in 0..4usize,
        pauses in proptest::collection::vec(0..20_000u32, 40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let scripted = |(i, faults): (usize, Vec<Fault>)| {
                let n_faults = faults.len() as u64;
                let script = move |_: ChunkId, n: u64| faults[usize::try_from(n % n_faults).unwrap()];
                Mirror::scripted(&format!("m{i}"), script)
            };
            let mut mirrors: Vec<_> = faults.into_iter().enumerate().map(scripted).collect();
            let healthy = healthy.min(mirrors.len());
            mirrors.insert(healthy, Mirror::new("healthy", Fault::Delay(10 * MS)));
            let group = group(&mirrors.iter().collect::<Vec<_>>());
            for pause in pauses {
                let mut avoid = Vec::new();
                loop {
                    let answer = tokio::time::timeout(60 * SECOND, group.fetch_avoiding(id(), &avoid)).await;
                    let fetched = answer.expect("an answer").expect("no error").expect("not missing");
                    if fetched.stored.bytes == PLAIN {
                        break;
                    }
                    assert!(fetched.store != "healthy" && !avoid.contains(&fetched.store));
                    avoid.push(fetched.store);
                }
                tokio::time::sleep(MS * pause).await;
            }
        });
    }
}
