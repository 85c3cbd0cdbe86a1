# SPDX-License-Identifier: Apache-2.0
# plugin.sh - what stack.sh, unstack.sh and clean.sh call, phase by phase
#
# The functions are in lib/fastboot.

_XTRACE_FASTBOOT_PLUGIN=$(set +o | grep xtrace)
set +o xtrace
source $FASTBOOT_DIR/devstack/lib/fastboot
$_XTRACE_FASTBOOT_PLUGIN

if is_service_enabled fastboot; then
    case "$1 $2" in
        "stack pre-install")
            echo_summary "Installing what fastboot needs"
            install_fastboot_jobboard
            ;;
        "stack install")
            echo_summary "Installing fastboot"
            install_fastboot
            ;;
        "stack post-config")
            echo_summary "Configuring fastboot"
            configure_fastboot
            init_fastboot
            ;;
        "stack extra")
            echo_summary "Starting fastboot"
            start_fastboot
            ;;
        "stack test-config")
            echo_summary "Checking fastboot"
            check_fastboot
            ;;
        "unstack ")
            stop_fastboot
            unlink_fastboot_nova
            ;;
        "clean ")
            cleanup_fastboot
            ;;
    esac
fi
