/* Points at which a test build (-DXDS_FAULT_POINTS) kills its process, as `kill -9` would, and says where on stdout.
 *
 * The environment variable XDS_FAULT_POINT arms one of them: "NAME" dies there, "NAME:3" when it is reached for the
 * third time since it was armed; "NAME~" stops there once, until SIGCONT, so that others go on meanwhile. Other builds
 * have no trace of this. tests/litmus drives it. */
#ifndef XDS_FAULT_H
#define XDS_FAULT_H

#ifdef XDS_FAULT_POINTS

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline void
fault_reached(const char *name)
{
    static int num_reached;
    const char *armed = getenv("XDS_FAULT_POINT");
    size_t length = strlen(name);
    if (armed == NULL || strncmp(armed, name, length) != 0 || (armed[length] != 0 && !strchr(":~", armed[length]))) {
        return;
    }
    int is_stop = armed[length] == '~';
    if (armed[length] == ':' && ++num_reached < atoi(armed + length + 1)) {
        return;
    }
    char text[64];
    int size = snprintf(text, sizeof text, "fault %s\n", name);
    if (write(STDOUT_FILENO, text, (size_t)size) == size) {
        if (is_stop) {
            unsetenv("XDS_FAULT_POINT");
        }
        raise(is_stop ? SIGSTOP : SIGKILL);
    }
}
#define FAULT(name) fault_reached(name)

#else
#define FAULT(name) ((void)0)
#endif

#endif
