"""Ways into MOYU from other libraries; each is a module that imports what it needs."""
