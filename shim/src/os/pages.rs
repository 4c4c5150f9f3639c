//! A buffer that costs nothing while it is idle.
//!
//! The whole range is mapped once and given no memory; a page is charged when it is first written, so a large buffer
//! that mostly sees small reads costs one page. [`Pages::release`] gives all of them back, which freeing a `Vec` does
//! not promise.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// An anonymous private mapping.
#[derive(Debug)]
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, like the memory of a `Vec<u8>`.
unsafe impl Send for Pages {}

impl Pages {
    /// Maps `len` bytes of zeros, `len` not 0.
    pub(crate) fn new(len: usize) -> io::Result<Pages> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // One touch must cost one page, whatever the machine's huge page policy; refusal only costs memory.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Pages { start, len }),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    /// Gives the memory back and keeps the range; it reads as zeros afterwards.
    pub(crate) fn release(&mut self) {
        // SAFETY: the range is our mapping, and `&mut self` proves that nobody looks into it. An anonymous private
        // page that is dropped reads as zeros, which is a valid value of `[u8]`.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` readable, initialised bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; `&mut self` makes it the only view.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no view of it can outlive `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_as_zeros_and_can_be_used_again() {
        let mut pages = Pages::new(10_000).unwrap();
        pages[9_999] = 7;
        pages.release();
        assert!(pages.iter().all(|byte| *byte == 0));
        pages[0] = 1;
        assert_eq!((pages[0], pages.len()), (1, 10_000));
    }
}
