"""The router over real sockets: routes are built by hand, engines are scripted or the fake one. No observation."""
