//! Who keeps the counters that spare bystanders a lookup in the books: see [`Filter`].

use aya::{
    Ebpf,
    maps::{Array, MapData},
};
use zinit_ebpf::{FILTER_ELEMENTS, FILTER_UNKNOWN, Filter, map};

use super::{
    books::{BooksError, OpenError, failed},
    load::LoadError,
};

/// What a build was built from.
type Sources = [u8; 32];

/// Says that the build with these sources keeps the counters from now on: those that are new, or were [taken over](take_over).
pub(super) fn keep(ebpf: &mut Ebpf, sources: Sources) -> Result<(), OpenError> {
    let mut last = Filter::default();
    for (word, bytes) in last.members.iter_mut().zip(sources.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    counters(ebpf)?
        .set(FILTER_ELEMENTS, last, 0)
        .map_err(failed("note who keeps the filter"))?;
    Ok(())
}

/// Makes counters that may have missed members say that there may be members everywhere: those of which somebody else than the build
/// that is attached was the last to say that they were kept, and those that did not exist while it was. For good, as what was missed
/// stays unknown. The hooks of this build are not attached yet.
pub(super) fn take_over(ebpf: &mut Ebpf, attached: Sources) -> Result<(), OpenError> {
    let mut counters = counters(ebpf)?;
    if kept_by(&counters)? == attached {
        return Ok(());
    }
    let unknown = Filter {
        members: [FILTER_UNKNOWN; 16],
    };
    for element in 0..FILTER_ELEMENTS {
        // A member that is counted at this moment need not be.
        counters
            .set(element, unknown, 0)
            .map_err(failed("change what spares bystanders a lookup"))?;
    }
    Ok(())
}

fn counters(ebpf: &mut Ebpf) -> Result<Array<&mut MapData, Filter>, LoadError> {
    let map = ebpf.map_mut(map::FILTER).ok_or(LoadError::NoMap(map::FILTER))?;
    map.try_into().map_err(|source| LoadError::Map {
        map: map::FILTER,
        source: Box::new(source),
    })
}

fn kept_by(counters: &Array<&mut MapData, Filter>) -> Result<Sources, BooksError> {
    let last = counters
        .get(&FILTER_ELEMENTS, 0)
        .map_err(failed("read who keeps the filter"))?;
    let mut sources = [0; 32];
    for (bytes, word) in sources.chunks_exact_mut(4).zip(last.members) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(sources)
}
