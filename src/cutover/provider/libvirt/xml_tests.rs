//! XML as libvirt gives it, odd XML, and no XML.
