// What the library was built from.

extern "C" const char *sieve_sources() { return SIEVE_SOURCES; }
