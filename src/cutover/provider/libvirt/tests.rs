//! The domain provider without a libvirt.
